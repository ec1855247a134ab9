from __future__ import annotations

import saeffect.steering


def test_all_is_honest():
    assert all(hasattr(saeffect.steering, name) for name in saeffect.steering.__all__)
    assert len(set(saeffect.steering.__all__)) == len(saeffect.steering.__all__)
