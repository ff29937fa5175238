"""From references and text to images."""
