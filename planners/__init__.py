"""From heat to plans: the PAR objective, placements, and the rounds that carry them out."""
