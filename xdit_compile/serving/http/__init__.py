"""HTTP as OpenAI's: what is asked is checked, put into the engine's queue, and answered; imports no PyTorch."""
