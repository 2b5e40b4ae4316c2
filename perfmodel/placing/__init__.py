"""Where the experts of a model should live: policies compared on steps they have not seen, and what follows."""
