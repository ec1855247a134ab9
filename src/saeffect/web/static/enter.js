// A link may hold the token behind "#", which browsers send to no server.
"use strict";

const token = decodeURIComponent(location.hash.slice(1));
if (token) {
  history.replaceState(null, "", location.pathname + location.search);
  document.getElementById("token").value = token;
  document.getElementById("enter").requestSubmit();
}
