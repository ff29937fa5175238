"""Attaching image prompts to UNets of diffusers. The only package that depends on diffusers' attention layers."""
