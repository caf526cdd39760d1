"""How fast the gateway is, beside what else can stand in front of a server."""
