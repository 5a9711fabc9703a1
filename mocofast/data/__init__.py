"""Images and their random views: sources, a stateless order, and three loaders with one interface."""
