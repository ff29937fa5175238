"""What imprompt costs beside plain diffusers. Speed is always a ratio within one run; nothing here passes or fails."""
