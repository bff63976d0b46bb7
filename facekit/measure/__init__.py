"""What a recogniser is worth and who is found, with intervals."""
