"""Projects of Label Studio: connecting, storing what they tell, reading back."""
