"""Training data: records from wherever they are, in an order that can be resumed, made into batches."""
