"""Images and their random views: sources, a stateless order, and loaders with one interface."""
