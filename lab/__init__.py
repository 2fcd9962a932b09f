"""What measures and compares. Nothing outside imports from here."""
