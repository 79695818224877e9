"""Steps whose work Ray spreads over the machines of a cluster. Only this folder imports Ray."""
