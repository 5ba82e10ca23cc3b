def is_available(device): return False
