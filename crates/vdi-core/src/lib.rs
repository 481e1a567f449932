//! VirtualBox VDI disk images: where the bytes of a virtual disk are, and in which order a file must be written.
