"""The figures that a module draws."""


def kept(monkeypatch, module, part):
    """A list that fills with what ``module.new_figure`` returns: figures (``part`` 0) or their axes (``part`` 1)."""
    drawn, new_figure = [], module.new_figure

    def keep(*args, **kwargs):
        made = new_figure(*args, **kwargs)
        drawn.append(made[part])
        return made

    monkeypatch.setattr(module, "new_figure", keep)
    return drawn
