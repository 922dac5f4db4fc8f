//! What the SMAPIv3 volume and datapath plugins for qcow2 are made of.
