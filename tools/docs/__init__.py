"""What the documentation takes from the code, so that it cannot say anything else than the program does."""
