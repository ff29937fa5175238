"""What imprompt costs beside plain diffusers. Speed is always a ratio within one run; nothing here passes or fails."""

import os

for library in ("TRANSFORMERS", "DIFFUSERS"):  # before they are imported: no advice to developers between the tables
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
