"""How fast the gateway is, compared with other proxies."""
