def audit(): pass
