"""What an image prompt is made with: adapter files, image encoders, base pipelines."""
