"""Where the experts of a model should live: policies compared on steps they have not seen, and what follows."""

# Rows of a comparison beside published policies: the best placement found, the best that divides no steps, a cache, and
# who knew the steps that judge.
OPTIMAL, FIXED, CACHE, FORESEEN = "optimal", "optimal-fixed", "lru", "foreseen"
OURS = (OPTIMAL, FIXED)
TO_COMPARE = (CACHE, FORESEEN)  # rows that nobody can choose: a cache is no placement, and nobody knows what comes
