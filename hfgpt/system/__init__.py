"""Files, devices, terminal, network and installed packages of this machine."""
