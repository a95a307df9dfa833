"""The network and its LightningModule."""
