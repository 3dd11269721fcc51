"""Other packages' plug-ins, each a module of its own that needs that package; nothing else imports them."""
