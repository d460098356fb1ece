package gateway

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// origins decides which web pages may talk to the gateway: pages of the same host,
// pages of loopback addresses, and the configured origins. Requests without an
// Origin header do not come from a page and are not its business.
type origins struct {
	all   bool
	exact map[string]bool
	// local says that the gateway listens on a loopback address. Then a Host that is
	// not loopback proves nothing: a foreign page can point its own name at 127.0.0.1
	// (DNS rebinding) and look like a page of the same host.
	local bool
}

// newOrigins checks the configured list. local says that the gateway listens on a
// loopback address.
func newOrigins(list []string, local bool) (*origins, error) {
	o := &origins{exact: make(map[string]bool, len(list)), local: local}
	if slices.Contains(list, "*") {
		if len(list) > 1 {
			return nil, errors.New("allowed origins: * stands alone; remove the others or it")
		}
		o.all = true
		return o, nil
	}
	for _, origin := range list {
		host, scheme, ok := splitOrigin(origin)
		if !ok || origin != scheme+"://"+host {
			return nil, errors.New("allowed origins: want lower-case scheme://host[:port] without path, for example https://app.example.com")
		}
		o.exact[origin] = true
	}
	return o, nil
}

// allowed reports whether the page that a request comes from, if any, may talk to
// the gateway. "null" is what sandboxed and local pages send: nobody in particular.
func (o *origins) allowed(r *http.Request) bool {
	values := r.Header.Values("Origin")
	if len(values) == 0 {
		return true
	}
	if len(values) > 1 {
		return false
	}
	if o.all {
		return true
	}
	origin := values[0]
	if o.exact[origin] {
		return true
	}
	host, scheme, ok := splitOrigin(origin)
	if !ok {
		return false
	}
	if loopbackHost(hostname(host)) {
		// A page that this machine serves may use a gateway on this machine only:
		// a public gateway has no reason to trust the visitor's localhost.
		return loopbackHost(hostname(r.Host))
	}
	if o.local {
		return false
	}
	// A page served over http may have been changed on its way, so it is not the
	// same as ours if we were reached over https.
	return strings.EqualFold(host, r.Host) && (scheme == "https" || r.TLS == nil)
}

// splitOrigin takes an origin apart; anything more than scheme and host fails.
func splitOrigin(origin string) (host, scheme string, ok bool) {
	u, err := url.Parse(origin)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" ||
		u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" ||
		strings.ContainsAny(origin, "?#") {
		return "", "", false
	}
	return strings.ToLower(u.Host), u.Scheme, true
}

// hostname removes the port of a host, and the brackets of an IPv6 address.
func hostname(host string) string {
	u := url.URL{Host: host}
	return u.Hostname()
}

// handle sets the CORS headers of a request for POST /sync. It returns false when
// the request is answered already: a preflight, or a page that is not allowed.
//
// No cookie identifies anybody here, so credentials are never allowed; the token in
// the Authorization header is the page's own.
func (o *origins) handle(w http.ResponseWriter, r *http.Request) bool {
	header := w.Header()
	header.Add("Vary", "Origin")
	origin := r.Header.Get("Origin")
	preflight := r.Method == http.MethodOptions
	if !o.allowed(r) {
		if preflight {
			w.WriteHeader(http.StatusNoContent) // without allow headers, which is the refusal
		} else {
			writeHTTPError(w, http.StatusForbidden, "ORIGIN: pages of this origin may not use the gateway")
		}
		return false
	}
	if origin != "" {
		if o.all {
			header.Set("Access-Control-Allow-Origin", "*")
		} else {
			header.Set("Access-Control-Allow-Origin", origin)
		}
	}
	if !preflight {
		return true
	}
	header.Set("Allow", "POST, OPTIONS")
	if origin != "" {
		header.Set("Access-Control-Allow-Methods", "POST")
		header.Set("Access-Control-Allow-Headers", "Authorization, Content-Type")
		header.Set("Access-Control-Max-Age", "600")
	}
	w.WriteHeader(http.StatusNoContent)
	return false
}
