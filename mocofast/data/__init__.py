"""Two random views of every image: sources, one stateless order, and two loaders behind one interface."""
