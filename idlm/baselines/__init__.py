"""Other diffusion decoders, small and faithful to their papers: what ISD is compared with."""
