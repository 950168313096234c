"""Sequential Monte Carlo: one engine for filters, tempering, steering and their combinations."""
