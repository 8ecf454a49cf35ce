"""What each set holds: latents, text and predictions, and how each is planned and computed."""
