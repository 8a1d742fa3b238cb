"""What a bundle's run does besides training: checking values, preparing, recording, resuming, reporting."""
