"""Expert routing, dispatch and placement."""
