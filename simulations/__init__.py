"""Floor 5: many clients on one machine."""
