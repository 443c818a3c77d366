"""What the machine is asked: files, devices, terminal, network, installed packages."""
