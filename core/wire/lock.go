package wire

import "time"

// LockRequest is LOCK_REQUEST, from a client: PROTOCOL 14.3.
type LockRequest struct {
	RequestID string
	Name      string
	TTLMillis uint64 // 1 ms to 24 h
	// Err says why the request must be refused. RequestID is known.
	Err *Error
}

// LockRelease is LOCK_RELEASE, from a client.
type LockRelease struct {
	RequestID    string
	Name         string
	FencingToken uint64 // 0: not said; no lock has it
	// Err says why the release must be refused. RequestID is known.
	Err *Error
}

// LockGranted is LOCK_GRANTED, from a server.
type LockGranted struct {
	RequestID    string
	Name         string
	FencingToken uint64 // at most 2^53, for JavaScript
}

// LockReleased is LOCK_RELEASED, from a server. It answers releases only: a
// client that waits for a lock takes it for a grant.
type LockReleased struct {
	RequestID string
	Name      string
	Success   bool
}

// maxLockTTL bounds for how long a lock is held without being asked for again.
const maxLockTTL = 24 * time.Hour / time.Millisecond

// Type implements Message.
func (m *LockRequest) Type() string { return "LOCK_REQUEST" }

// AppendTo implements Message.
func (m *LockRequest) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 3)
	dst = appendText(dst, "requestId", m.RequestID)
	dst = appendText(dst, "name", m.Name)
	return appendNumber(dst, "ttl", m.TTLMillis)
}

// Type implements Message.
func (m *LockRelease) Type() string { return "LOCK_RELEASE" }

// AppendTo implements Message.
func (m *LockRelease) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 3)
	dst = appendText(dst, "requestId", m.RequestID)
	dst = appendText(dst, "name", m.Name)
	return appendNumber(dst, "fencingToken", m.FencingToken)
}

// Type implements Message.
func (m *LockGranted) Type() string { return "LOCK_GRANTED" }

// AppendTo implements Message.
func (m *LockGranted) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 3)
	dst = appendText(dst, "requestId", m.RequestID)
	dst = appendText(dst, "name", m.Name)
	return appendNumber(dst, "fencingToken", m.FencingToken)
}

// Type implements Message.
func (m *LockReleased) Type() string { return "LOCK_RELEASED" }

// AppendTo implements Message.
func (m *LockReleased) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 3)
	dst = appendText(dst, "requestId", m.RequestID)
	dst = appendText(dst, "name", m.Name)
	return appendFlag(dst, "success", m.Success)
}

func (d *decoder) lockRequest() (Message, *Error) {
	m := new(LockRequest)
	ttlErr := badLockTTL()
	var nameErr *Error
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "requestId":
			return d.text("requestId", maxID, &m.RequestID)
		case "name":
			nameErr = d.resourceName("name", &m.Name)
		case "ttl":
			m.TTLMillis, ttlErr = d.lockTTL()
		default:
			d.skip()
		}
		return nil
	})
	switch {
	case err != nil:
	case !validID(m.RequestID):
		err = badMessage("requestId must be a string of " + idRule)
	case nameErr != nil:
		m.Err = nameErr
	case ttlErr != nil:
		m.Err = ttlErr
	default:
		m.Err = CheckResourceName(m.Name)
	}
	return m, err
}

// lockTTL reads for how long a lock is to be held, in ms.
func (d *decoder) lockTTL() (uint64, *Error) {
	n, err := d.ttl()
	if err != nil || n == 0 || n > uint64(maxLockTTL) {
		return 0, badLockTTL()
	}
	return n, nil
}

func badLockTTL() *Error {
	return &Error{Name: BadTTL, Code: 400, Text: "the ttl of a lock must be a number of ms from 1 to 24 hours"}
}

func (d *decoder) lockRelease() (Message, *Error) {
	m := new(LockRelease)
	var nameErr, tokenErr *Error
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "requestId":
			return d.text("requestId", maxID, &m.RequestID)
		case "name":
			nameErr = d.resourceName("name", &m.Name)
		case "fencingToken":
			tokenErr = d.count("fencingToken", &m.FencingToken)
		default:
			d.skip()
		}
		return nil
	})
	switch {
	case err != nil:
	case !validID(m.RequestID):
		err = badMessage("requestId must be a string of " + idRule)
	case nameErr != nil:
		m.Err = nameErr
	case tokenErr != nil:
		m.Err = tokenErr
	default:
		m.Err = CheckResourceName(m.Name)
	}
	return m, err
}

func (d *decoder) lockGranted() (Message, *Error) {
	m := new(LockGranted)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "requestId":
			return d.serverText("requestId", &m.RequestID)
		case "name":
			return d.serverText("name", &m.Name)
		case "fencingToken":
			return d.count("fencingToken", &m.FencingToken)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) lockReleased() (Message, *Error) {
	m := new(LockReleased)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "requestId":
			return d.serverText("requestId", &m.RequestID)
		case "name":
			return d.serverText("name", &m.Name)
		case "success":
			return d.flag("success", &m.Success)
		}
		d.skip()
		return nil
	})
	return m, err
}
