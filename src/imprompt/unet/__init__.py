"""Where an adapter plugs into a denoiser. The only rooms that know diffusers' attention."""
