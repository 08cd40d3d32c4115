def load_policy(): pass
def save_policy(): pass
