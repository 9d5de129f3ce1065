"""What runs in users' processes beside the router: light imports only."""
