"""Models: endpoints, recordings and simulations behind one interface. The only package that uses HTTP."""
