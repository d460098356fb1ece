{{- define "topgun.serviceaccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata: {{- include "topgun.metadata" . | nindent 2 }}
automountServiceAccountToken: false
{{- end }}

{{/* The Service of a chart whose one port is for services and operators. Takes root, port, sticky. */}}
{{- define "topgun.service" -}}
apiVersion: v1
kind: Service
metadata: {{- include "topgun.metadata" .root | nindent 2 }}
spec:
  selector: {{- include "topgun.selector" .root | nindent 4 }}
  {{- if .sticky }}
  # A gateway's stream and the calls that steer it must reach the same pod, also
  # when the gateway opens a second connection.
  sessionAffinity: ClientIP
  sessionAffinityConfig:
    clientIP: {timeoutSeconds: 86400}
  {{- end }}
  ports:
    # HTTP/2 without TLS.
    - {name: rpc, port: {{ .port }}, targetPort: rpc, appProtocol: kubernetes.io/h2c}
{{- end }}

{{- define "topgun.poddisruptionbudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{- include "topgun.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ .Values.podDisruptionBudget.maxUnavailable }}
  # A pod that is not ready serves nobody: it never holds up a drain.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "topgun.selector" . | nindent 6 }}
{{- end }}

{{- define "topgun.horizontalpodautoscaler" -}}
{{- with .Values.autoscaling }}
{{- if .enabled }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {{- include "topgun.metadata" $ | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "topgun.name" $ }}
  minReplicas: {{ .minReplicas }}
  maxReplicas: {{ .maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ .cpuUtilization }}}
  behavior:
    # A pod that goes sends what was connected to it elsewhere: not for a short lull.
    scaleDown:
      stabilizationWindowSeconds: 300
      policies: [{type: Pods, value: 1, periodSeconds: 60}]
{{- end }}
{{- end }}
{{- end }}

{{/* Takes root, port. */}}
{{- define "topgun.servicemonitor" -}}
{{- with .root.Values.serviceMonitor }}
{{- if .enabled }}
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  {{- include "topgun.metadata" $.root | nindent 2 }}
    {{- with .labels }}{{- toYaml . | nindent 4 }}{{- end }}
spec:
  selector:
    matchLabels: {{- include "topgun.selector" $.root | nindent 6 }}
  endpoints:
    - {port: {{ $.port }}, path: /metrics, interval: {{ .interval }}}
{{- end }}
{{- end }}
{{- end }}

{{/*
NetworkPolicy that denies everything to and from the pods of the chart, but
  from    {service, port}: our services that may call
  to      {service, port}: our services that may be called
  peers   {peers, port}: others that may be called; no peers are everybody
  clients {peers, port}: others that may call; no peers are everybody
and what every service needs: operators on operatorPort, DNS, and the collector of
traces where there is one.
*/}}
{{- define "topgun.networkpolicy" -}}
{{- $_ := merge . (dict "from" list "to" list "peers" list "clients" list) -}}
{{- $root := .root -}}
{{- $global := .root.Values.global -}}
{{- if $global.networkPolicy.enabled -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "topgun.metadata" $root | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "topgun.selector" $root | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    {{- range .from }}
    - from: {{- include "topgun.peer" (dict "root" $root "service" .service) | nindent 8 }}
      ports: [{protocol: TCP, port: {{ .port }}}]
    {{- end }}
    {{- range .clients }}
    - ports: [{protocol: TCP, port: {{ .port }}}]
      {{- with .peers }}
      from: {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    - from: {{- toYaml $global.networkPolicy.operatorPeers | nindent 8 }}
      ports: [{protocol: TCP, port: {{ .operatorPort }}}]
  egress:
    {{- range .to }}
    - to: {{- include "topgun.peer" (dict "root" $root "service" .service) | nindent 8 }}
      ports: [{protocol: TCP, port: {{ .port }}}]
    {{- end }}
    {{- range .peers }}
    - ports: [{protocol: TCP, port: {{ .port }}}]
      {{- with .peers }}
      to: {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    {{- with index $root.Values.flags "otlp-endpoint" }}
    - to: {{- toYaml $global.networkPolicy.operatorPeers | nindent 8 }}
      ports: [{protocol: TCP, port: {{ include "topgun.urlPort" . }}}]
    {{- end }}
    - to: {{- toYaml $global.networkPolicy.dnsPeers | nindent 8 }}
      ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- end }}
{{- end }}

{{/* The port of a URL, or that of its scheme. */}}
{{- define "topgun.urlPort" -}}
{{- $url := urlParse . -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end }}
