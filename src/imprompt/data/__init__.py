"""Training data: readers of records, resumable sampling order, transforms, batches, feature caches."""
