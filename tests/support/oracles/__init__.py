"""What others compute of the same things: diffusers, webdataset, torch, and plain loops."""
