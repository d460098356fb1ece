package gateway

import (
	"github.com/gobwas/ws"
)

// closeReason ends a session: the close code, which alone tells a client what to do,
// and a fixed text for people. RELIABILITY 3 lists the codes.
type closeReason struct {
	code ws.StatusCode
	text string
}

func (r closeReason) Error() string { return r.text }

var (
	closeProtocol    = closeReason{ws.StatusProtocolError, "WebSocket protocol violated"}
	closeText        = closeReason{ws.StatusUnsupportedData, "messages are binary"}
	closeBadPayload  = closeReason{ws.StatusInvalidFramePayloadData, "close reason is not UTF-8"}
	closeTooBig      = closeReason{ws.StatusMessageTooBig, "message too big"}
	closeErrors      = closeReason{ws.StatusPolicyViolation, "too many bad messages"}
	closeDribble     = closeReason{ws.StatusPolicyViolation, "message took too long to arrive"}
	closeIdle        = closeReason{ws.StatusPolicyViolation, "nothing heard for too long"}
	closeRestart     = closeReason{ws.StatusCode(1012), "restarting; connect again"}
	closeTryLater    = closeReason{ws.StatusCode(1013), "not all was taken; connect again and send it again"}
	closeBusy        = closeReason{ws.StatusCode(1013), "too much in flight; connect again later"}
	closeVersion     = closeReason{4400, "protocol version not supported"}
	closeAuthFailed  = closeReason{4401, "authentication failed"}
	closeExpired     = closeReason{4401, "token expired"}
	closeAuthTimeout = closeReason{4408, "not authenticated in time"}
	closeFlood       = closeReason{4429, "too many messages"}
	closeSlow        = closeReason{4490, "reads too slowly"}
	// closeLost is for the log: nobody is left to send it to.
	closeLost = closeReason{ws.StatusAbnormalClosure, "connection lost"}
)

// closeBody is the payload of the close frame. 1005 and 1006 stand for a frame
// without a code and for no frame, and are never sent (RFC 6455 7.4.1).
func closeBody(r closeReason) []byte {
	if r.code == ws.StatusNoStatusRcvd || r.code == ws.StatusAbnormalClosure {
		return nil
	}
	return ws.NewCloseFrameBody(r.code, r.text)
}

// fixedError is an error with a fixed text.
type fixedError string

func (e fixedError) Error() string { return string(e) }
