def train(config): raise NotImplementedError
