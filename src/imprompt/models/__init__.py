"""Models by name or file: adapters, image and face encoders, base pipelines, and the image prompts that are made with them."""
