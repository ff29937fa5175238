"""Image prompts in diffusion transformers: attention sites, processors, and how image prompts are attached."""
