"""The pipeline of a peer: msgc, workers and their loop, who hears of an outcome."""
