"""numpy-app: A Flower / NumPy app."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from numpy_app.task import load_data


class FlowerClient(NumPyClient):
    """Steps of gradient descent on a linear model."""

    def __init__(self, x, y, lr):
        self.x, self.y, self.lr = x, y, lr

    def fit(self, parameters, config):
        (weights,) = parameters
        for _ in range(config["steps"]):
            weights = weights - self.lr * self.x.T @ (self.x @ weights - self.y) / len(self.y)
        return [weights], len(self.y), {}

    def evaluate(self, parameters, config):
        loss = float(np.mean((self.x @ parameters[0] - self.y) ** 2))
        return loss, len(self.y), {"rmse": loss**0.5}


def client_fn(context: Context):
    x, y = load_data(context.node_config["partition-id"])
    return FlowerClient(x, y, context.run_config["learning-rate"]).to_client()


app = ClientApp(client_fn=client_fn)
