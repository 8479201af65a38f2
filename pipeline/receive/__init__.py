"""What peers send: the receiving loop, the handlers, and the fronts they are behind."""
