"""What a plan splits."""
