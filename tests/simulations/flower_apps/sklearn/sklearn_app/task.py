"""sklearn-app: A Flower / scikit-learn app."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


def load_data(partition_id: int, num_partitions: int):
    """Load one partition of the digits: X_train, X_test, y_train, y_test."""
    X, y = load_digits(return_X_y=True)
    X, y = X[partition_id::num_partitions] / 16, y[partition_id::num_partitions]
    cut = int(0.8 * len(X))
    return X[:cut], X[cut:], y[:cut], y[cut:]


def get_model(penalty: str, local_epochs: int):
    """A logistic regression that goes on from the parameters that it is given."""
    return LogisticRegression(penalty=penalty, max_iter=local_epochs, warm_start=True)


def get_model_params(model):
    return [model.coef_, model.intercept_]


def set_model_params(model, params):
    model.coef_, model.intercept_ = params[0], params[1]
    return model


def set_initial_params(model):
    """Parameters as zeros, since the model has none until it is fitted."""
    model.classes_ = np.arange(10)
    model.coef_ = np.zeros((10, 64))
    model.intercept_ = np.zeros((10,))
