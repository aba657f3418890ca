"""Learning what examples look like: decoders, likelihoods, and how near samples come."""
